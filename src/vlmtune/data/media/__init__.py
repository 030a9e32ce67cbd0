"""Pictures and videos: sizes from headers, pixels, chosen frames."""
