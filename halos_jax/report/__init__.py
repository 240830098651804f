"""The page about a run: report.html in its workdir, and pages that compare runs."""
