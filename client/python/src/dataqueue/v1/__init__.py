"""The messages and stubs of the contract, generated from proto/ when the package is built."""
