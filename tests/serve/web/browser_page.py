"""The page in a browser, as a visitor uses it."""

from tests.serve.running import wait_until


class Page:
    """Actions and locators of a page."""

    def __init__(self, page, engine=None):
        from playwright.sync_api import expect

        self.page, self.engine, self.expect = page, engine, expect
        self.num_requests = 0 if engine is None else len(engine.requests)
        self.box = page.locator("#box textarea")
        self.answers = page.get_by_test_id("bot")
        self.questions = page.get_by_test_id("user")
        self.notification = page.get_by_test_id("toast-body")

    def add(self, *files):
        before = self.page.locator("#box .thumbnail-item").count()
        self.page.set_input_files("#box input[type=file]", files)
        self.expect(self.page.locator("#box .thumbnail-item")).to_have_count(before + len(files))
        self.expect(self.page.locator("#box .loader")).to_have_count(0)

    def ask(self, question):
        self.box.fill(question)
        self.page.locator("#box .submit-button").click()

    def next_request(self):
        """The next question at the engine."""
        self.num_requests += 1
        wait_until(lambda: len(self.engine.requests) >= self.num_requests, 20)
        return self.engine.requests[self.num_requests - 1]

    def answer(self, *chunks):
        request = self.next_request()
        for chunk in chunks:
            request.emit(chunk)
        request.end()
        self.expect(self.page.locator("#box .submit-button")).to_be_visible()
        return request

    def tab(self, number):
        self.page.get_by_role("tab").nth(number).click()
