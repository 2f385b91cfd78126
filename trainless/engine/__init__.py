"""The walk of a call: an attention call goes through the plan of its site, on the cheapest path that is exact."""
