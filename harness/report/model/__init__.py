"""What a report shows, as values computed from records alone."""
