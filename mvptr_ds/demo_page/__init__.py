"""A page in the browser that shows what a trained model finds: `mvptr demo-page RUN`."""
