"""Output for people: reports, drawings, tables."""
