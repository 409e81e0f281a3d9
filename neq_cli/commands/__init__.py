"""The commands of `neq`, one function each: parse, call, print."""
