"""Commands that read what runs have written: `asyncrl report`, `asyncrl watch` and `asyncrl compare`."""
