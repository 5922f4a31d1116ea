"""`report.html`: one page that shows what runs left in their folders."""
