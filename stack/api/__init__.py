"""The wire types of the Llama Stack APIs, one file per API."""
