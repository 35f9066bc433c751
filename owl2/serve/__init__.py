"""The server: OpenAI's API and the web page, for `owl2 serve` and `owl2 web`.

`launch` starts it and `app` has the routes. `generation` takes a request to its answers; see
`admission` for their order, and `request_images` for their images.
"""
