# SPDX-License-Identifier: Apache-2.0
"""Reports: run folders as one HTML page, as a table, and as pictures.

write_report([Path("runs/a"), Path("runs/b")], Path("report.html"))
"""

from steadyvq.report.page import write_report
from steadyvq.report.pictures import code_map, image_grid, picture_grid
from steadyvq.report.table import comparison_table

__all__ = ["code_map", "comparison_table", "image_grid", "picture_grid", "write_report"]
