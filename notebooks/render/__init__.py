"""What makes notebooks and pages of an article: it knows cells and figures."""
