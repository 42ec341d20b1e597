"""Networks that give logits, and the energies read from them."""
