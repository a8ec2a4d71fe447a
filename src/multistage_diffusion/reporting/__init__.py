"""What is shown to people: reports, drawings, tables."""
