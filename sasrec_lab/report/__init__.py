"""Run folders -> tables, tests, figures, one page. Reads what train wrote, changes nothing, needs no torch."""
