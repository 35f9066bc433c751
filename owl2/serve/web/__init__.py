"""The web page: questions about images in a browser, and attention maps of the answers.

`mount` adds the page to an app; `page` defines its layout, `chat_handler` and `attention_tab` its
behavior, `i18n` its texts, `page.css` its style and `page.js` its code in the browser.
"""
