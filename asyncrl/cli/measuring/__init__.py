"""Commands that say how fast a configuration is: by running it (bench), or by thinking it over (simulate)."""
