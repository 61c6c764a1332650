"""Settings for all tests."""

from hypothesis import HealthCheck, settings

# The first example of a property pays for importing and compiling; on a busy machine that takes longer than a second.
settings.register_profile("epsbench", suppress_health_check=[HealthCheck.too_slow], deadline=None)
settings.load_profile("epsbench")
