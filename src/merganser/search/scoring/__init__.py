"""What a trial is worth: its objectives, scored on items or by an external command, and when it ends early."""
