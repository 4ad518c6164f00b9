"""kvmix's programs in Python: kvmix-dump (dump) and kvmix-report (report)."""
