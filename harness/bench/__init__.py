"""The throughput benchmark: engines side by side, each compared with the naive loop before it is timed.

`plan` reads what to time; `trial` tries one engine in a process of its own; `race` times those that are right in turn;
`session` makes records of both; `table` is made from records and from nothing else.
"""
