"""What tests share: builders of records, models, planted faults, and the place of the repository."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
# Names a folder of this session of tests, which its processes have from their parent.
SHARED = "EPSBENCH_TESTS_SHARED"
