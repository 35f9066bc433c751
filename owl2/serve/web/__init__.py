"""The web page: questions about images in a browser, and attention maps of the answers.

`mount` adds the page to an app; `page` defines its layout, `chat_handler` and `attention_tab` its
behavior, `gateway` its routes, `uploads` its files, `i18n` its texts, `page.css` its style and
`page.js` its code in the browser.
"""

import os

from owl2.serve.web.uploads import create_private_directory

# Set before gradio is imported. By default gradio reports its use over the network, evaluates the
# durations of all events after each event, and all gradio programs of a machine share one directory
# for uploads, from which each deletes files.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**9)
os.environ["GRADIO_TEMP_DIR"] = create_private_directory(os.environ.get("GRADIO_TEMP_DIR"))
