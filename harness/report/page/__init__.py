"""What a report shows: the HTML pages, their drawings and the data of their scripts."""
