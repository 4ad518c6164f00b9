"""The parts of kvmix-report: inputs (read and check), collect (run the programs), charts (draw),
page (write HTML)."""
