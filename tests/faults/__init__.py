"""One test for each fault that was found: its input gives the right value. Run one by its letter and number."""
