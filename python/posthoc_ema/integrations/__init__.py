"""Averages of any length within other frameworks; each module imports its own framework and no other."""
