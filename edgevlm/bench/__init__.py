"""How fast it is, and how sure we are: workload, measurement, record, report, comparison.  No torch."""
