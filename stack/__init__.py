"""The Llama Stack as a library: wire types, behaviours, store and artifacts. It knows nothing of HTTP."""
