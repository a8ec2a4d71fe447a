"""Source of the files that an export to diffusers consists of; `interop.self_contained` reads them, nothing imports them."""
