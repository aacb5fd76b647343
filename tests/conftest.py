"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# An example may wait for a slow machine; how long a thing may take is tested where it is promised.
settings.register_profile("optplan", deadline=None)
settings.load_profile("optplan")
