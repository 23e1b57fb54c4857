"""The paper's statements, checked on real gradients: what ``caspr-verify`` computes."""
