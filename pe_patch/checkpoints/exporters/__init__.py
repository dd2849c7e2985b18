"""Write a patched model as a checkpoint that other tools load without pe_patch."""
