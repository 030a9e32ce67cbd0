"""What a hub id looks like; light, for the command line asks before anything heavy is imported."""

from __future__ import annotations

import re

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
