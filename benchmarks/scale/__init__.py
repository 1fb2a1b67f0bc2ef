"""How a step's cost grows, and what it should be: exponents from measurements, and a cost model beside them."""
