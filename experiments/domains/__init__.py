"""What adapters do where a model of texts, speech or images meets another domain."""
