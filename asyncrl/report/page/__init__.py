"""The page of a run, report.html: one file that needs nothing else and asks nobody for anything.

charts                   which charts there are and what they read; `curves` makes them of records
points  scales  chart    figures on grids, places of figures, a chart as data
drawing  lanes  headline  markup    the parts of a page, as markup
document                 all of it together; page.css and page.js go in as they are
"""
