"""The browser, and the pages that it opens, for all tests of reports."""

from tests.support.browser import browser as browser
from tests.support.browser import reports as reports
