"""Rows laid down and tokenised once, into shards that every command maps."""
