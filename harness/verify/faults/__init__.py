"""Planted faults: parts, models and losses that are wrong on purpose, and the instrument that catches each.

`gallery` lists the faults, which public code or a paper really had; `epsbench faults` runs it. Nothing that trains may
use them, and none is registered.
"""

from typing import Any

HIDDEN: dict[str, Any] = {}
"""What faulty parts remember outside their states, where no part may keep anything."""
