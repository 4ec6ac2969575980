"""From a config to a folder of rows: plan, run, record, summarise."""
