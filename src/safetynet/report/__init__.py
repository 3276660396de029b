"""The report of a run as one HTML file, as one page of Markdown, and an index of many runs.

In: run directories. Out: text. A run that lacks stages or tables is shown as far as it goes, and says what is
missing. `report.stage` writes the files.
"""

from safetynet.report.build import markdown, report
from safetynet.report.contents import Contents, read
from safetynet.report.overview import REPORT, index

__all__ = ["REPORT", "Contents", "index", "markdown", "read", "report"]
