"""The steps of a request's life: they decide by the domain's rules and act through the ports."""
