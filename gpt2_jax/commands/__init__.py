"""Programs: what each subcommand does with its flags."""
