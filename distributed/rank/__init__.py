"""[rank] One process per GPU: joins, loads, denoises, decodes, writes."""
