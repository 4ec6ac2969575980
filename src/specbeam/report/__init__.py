"""What a run looks like to a reader: the terminal table and the HTML page."""
