"""A page in the browser that shows what a trained model finds: `tools/demo_page.py RUN`."""
