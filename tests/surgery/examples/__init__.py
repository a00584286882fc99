"""One short technique for each place: what CONTRIBUTING shows, and what tests hold to be enough."""
