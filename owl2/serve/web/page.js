// Runs when the page is loaded. Returns the language: the saved choice, else that of the browser.
() => {
  const find = (selector) => document.querySelector(selector);
  const textBox = () => find("#box textarea");
  const fileInput = () => find("#box input[type=file]");

  // ---------------------------------------------------------------- language and theme

  const setLanguage = async (language) => {
    document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
    // gradio has both languages; the name of the module that switches them contains a hash.
    const loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
    const core = loaded.find((name) => /\/assets\/core-[^/]*\.js$/.test(name));
    await (await import(core)).changeLocale(language === "zh" ? "zh-CN" : "en");
  };
  const theme = localStorage.getItem("owl2-theme");
  if (theme) document.body.classList.toggle("dark", theme === "dark");

  // ---------------------------------------------------------------- connection
  //
  // gradio's page stops working when the connection is lost, and loads again when it returns. That
  // would delete the conversation and the typed question. Here requests wait for the server, and
  // streams end as if the event were complete. The images are kept, because a server that was
  // restarted has deleted its uploads.

  const request = window.fetch.bind(window);
  const files = new Map();  // uploaded files by their path in the server
  const events = new Set();  // ids of the events of the current stream
  const streams = new Set();  // functions that end a stream
  let connected = null;  // a promise while the connection is lost
  let isInterrupted = false;  // whether it was lost during an answer
  let pending = null;  // the text box whose question is being answered
  let draft = null;  // the text box
  let turns = [];  // the answered turns

  // Until the tab is closed, a reload restores these three. They belong to this tab only.
  const STORE = "owl2-conversation";
  const isEmpty = (box) => !box?.text && !box?.files?.length;
  let saved = JSON.parse(sessionStorage.getItem(STORE) ?? "null");
  const save = () => {
    if (saved) return;  // not yet restored
    sessionStorage.removeItem(STORE);
    if (!turns.length && isEmpty(draft) && isEmpty(pending)) return;
    // A very long conversation exceeds the quota.
    try { sessionStorage.setItem(STORE, JSON.stringify({ turns, draft, pending })); } catch {}
  };

  const isAvailable = async () => {
    const reply = await request("theme.css", { cache: "no-store" }).catch(() => null);
    return reply !== null && reply.status < 500;
  };
  const connect = () => {
    connected ??= (async () => {
      find("#connection-lost").classList.add("shown");
      do await new Promise((resolve) => setTimeout(resolve, 1000)); while (!(await isAvailable()));
      connected = null;
      find("#connection-lost").classList.remove("shown");
      if (isInterrupted) find("#recover").click();
      isInterrupted = false;
    })();
    return connected;
  };
  const isUnavailable = (reply) => [502, 503, 504].includes(reply.status);

  // The stream of a reply, null if there is none. When it breaks, its events end without a change
  // of the page.
  const unbroken = (reply, signal) => {
    const reader = (reply?.body ?? new Blob([]).stream()).getReader();
    let isComplete = false;
    const read = async (controller) => {
      const part = await reader.read().catch(() => ({ done: true }));
      const text = new TextDecoder().decode(part.value);
      isComplete ||= text.includes('"close_stream"');
      if (isComplete) events.clear();
      // A server that stops reports an error before the end, after which gradio's page does nothing.
      if (!part.done && !/"msg": ?"unexpected_error"/.test(text)) return controller.enqueue(part.value);
      reader.cancel().catch(() => {});
      streams.delete(end);
      if (!isComplete && !signal.aborted) {
        isInterrupted = true;
        connect();
        const messages = [...events].map((id) => (
          { msg: "process_completed", event_id: id, success: true, output: { data: [] } }
        ));
        messages.push({ msg: "close_stream", event_id: null });
        const last = messages.map((message) => `data: ${JSON.stringify(message)}\n\n`).join("");
        controller.enqueue(new TextEncoder().encode(last));
        events.clear();
      }
      controller.close();
    };
    const end = () => reader.cancel();
    streams.add(end);
    const headers = { "Content-Type": "text/event-stream" };
    return new Response(new ReadableStream({ pull: read, cancel: end }), { headers });
  };
  // Without a network, a stream would wait for minutes. A server on this machine remains available.
  window.addEventListener("offline", async () => {
    if (await isAvailable()) return;
    connect();
    streams.forEach((end) => end());
  });

  window.fetch = async (resource, options) => {
    const url = String(resource.url ?? resource);
    if (url.endsWith("/app_id")) await connect();  // gradio loads the page when this succeeds
    const isJoin = url.includes("/queue/join"), isStream = url.includes("/queue/data");
    let reply = await request(resource, options).catch((error) => {
      if (!isJoin && !isStream) throw error;
      return null;
    });
    while (isJoin && (!reply || isUnavailable(reply))) {
      textBox().readOnly = true;
      await connect();
      textBox().readOnly = false;
      const body = JSON.stringify(await withFiles(JSON.parse(options.body)).catch(() => null));
      if (body !== "null") reply = await request(resource, { ...options, body }).catch(() => null);
    }
    if (isJoin) find("#signed-out").classList.toggle("shown", reply.status === 401);
    if (isJoin && reply.ok) events.add((await reply.clone().json()).event_id);
    if (isStream && (!reply || isUnavailable(reply) || reply.ok)) return unbroken(reply?.ok ? reply : null, resource.signal);
    if (url.includes("/upload") && reply.ok && options?.body instanceof FormData) {
      const paths = await reply.clone().json();
      options.body.getAll("files").forEach((file, index) => files.set(paths[index], file));
    }
    return reply;
  };

  const address = (path) => "gradio_api/file=" + encodeURI(path).replace(/[?#]/g, encodeURIComponent);
  const exists = async (path) => (await request(address(path), { headers: { Range: "bytes=0-0" } })).ok;
  const uploadAgain = async (path) => {
    const file = files.get(path);
    if (!file || await exists(path)) return path;
    const body = new FormData();
    body.append("files", file, file.name);
    const [created] = await (await window.fetch("gradio_api/upload", { method: "POST", body })).json();
    return created;
  };
  // A copy of a value in which all files exist in the server.
  const withFiles = async (value) => {
    if (Array.isArray(value)) return Promise.all(value.map(withFiles));
    if (value === null || typeof value !== "object") return value;
    const entries = Object.entries(value).map(async ([key, item]) => [key, await withFiles(item)]);
    const copy = Object.fromEntries(await Promise.all(entries));
    if (typeof copy.path === "string") copy.path = await uploadAgain(copy.path);
    return copy;
  };
  const upload = (inputs) => withFiles(inputs).catch(() => inputs);
  // A copy of a turn or a text box without the files that the server has deleted.
  const withoutLostFiles = async (turn) => {
    const kept = await Promise.all((turn.files ?? []).map((file) => exists(file.path).catch(() => false)));
    return { ...turn, files: (turn.files ?? []).filter((_, index) => kept[index]) };
  };

  window.owl2 = {
    setLanguage,
    choose: (language) => { localStorage.setItem("owl2-language", language); setLanguage(language); },
    theme: () => {
      const dark = document.body.classList.toggle("dark");
      localStorage.setItem("owl2-theme", dark ? "dark" : "light");
    },
    upload,
    send: (inputs) => { pending = inputs[0]; save(); return upload(inputs); },
    write: (box) => { draft = box; save(); },
    signOut: () => { sessionStorage.removeItem(STORE); location.href = "logout"; },
    // The inputs of `recover`: the question without an answer, unless another one was typed.
    resend: async ([box, conversation, memory]) => {
      let unanswered = pending;
      if (saved) {
        const boxes = [saved.draft, saved.pending].filter((one) => !isEmpty(one));
        unanswered = boxes.length ? await withoutLostFiles(boxes[0]) : null;
        memory = await Promise.all(saved.turns.map(withoutLostFiles));
        saved = null;
      }
      return upload([isEmpty(box) ? unanswered : box, conversation, memory]);
    },
    // Called when an answer is complete: keep the images of the conversation.
    keep: (memory) => {
      pending = null;
      turns = memory ?? [];
      save();
      if (!turns.length) files.clear();
      const paths = turns.flatMap((turn) => turn.files.map((file) => file.path));
      for (const path of paths.filter((path) => !files.has(path))) {
        request(address(path)).then(async (reply) => {
          if (reply.ok) files.set(path, new File([await reply.blob()], path.split("/").pop()));
        }).catch(() => {});
      }
    },
  };

  // ---------------------------------------------------------------- images from anywhere

  const addImages = (event, data) => {
    if (!fileInput() || !data?.files.length || event.target.closest?.("#box")) return;
    event.preventDefault();
    fileInput().files = data.files;
    fileInput().dispatchEvent(new Event("change", { bubbles: true }));
    textBox().focus();
  };
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => addImages(event, event.dataTransfer));
  document.addEventListener("paste", (event) => {
    addImages(event, event.clipboardData);
    const text = event.clipboardData?.getData("text/plain");
    const isEditable = event.target.closest?.("input, textarea, [contenteditable]");
    if (event.defaultPrevented || isEditable || !text || !textBox()?.offsetParent) return;
    event.preventDefault();
    textBox().focus();
    document.execCommand("insertText", false, text);
  });

  // Questions contain entities in place of markup, see `plain_text`.
  const writeText = navigator.clipboard?.writeText.bind(navigator.clipboard);
  if (writeText) {
    navigator.clipboard.writeText = (text) =>
      writeText(text.replace(/&#(\d{7});/g, (_, code) => String.fromCharCode(code)));
  }

  // ---------------------------------------------------------------- keyboard and screen readers

  document.addEventListener("keydown", (event) => {
    const tabs = [...(event.target.closest?.("[role=tablist]")?.querySelectorAll("[role=tab]") ?? [])];
    const current = tabs.indexOf(event.target);
    const next = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: -1 }[event.key];
    if (current < 0 || next === undefined) return;
    event.preventDefault();
    tabs.at(next % tabs.length).focus();
    tabs.at(next % tabs.length).click();
  });

  // gradio's roles and names of some elements are not valid. It sets them again when they change.
  const remove = (...names) => (element) => names.forEach((name) => element.removeAttribute(name));
  const repairs = {
    "#chat .examples[role]": remove("role"),
    "#chat [data-testid=user][aria-label], #chat [data-testid=bot][aria-label]": remove("aria-label"),
    ".toast-header[role]": remove("role", "tabindex"),
    "#box .thumbnail-wrapper[role]": remove("role", "aria-label"),
    "#chat .image-container > button:not([aria-label])": (button) => {
      const name = decodeURIComponent(button.querySelector("img")?.src.split("/").pop() ?? "");
      button.setAttribute("aria-label", name);
    },
    // A heading in an answer; the only first one is the name of the page.
    "#chat h1:not([aria-level])": (heading) => heading.setAttribute("aria-level", "2"),
    "[role=tab][aria-selected=true][tabindex]": remove("tabindex"),
    "[role=tab][aria-selected=false]:not([tabindex])": (tab) => tab.setAttribute("tabindex", "-1"),
  };
  const repair = () => {
    for (const [selector, change] of Object.entries(repairs)) document.querySelectorAll(selector).forEach(change);
  };
  const attributeFilter = ["role", "aria-label", "aria-selected"];
  new MutationObserver(repair).observe(document.body, { subtree: true, childList: true, attributes: true, attributeFilter });
  repair();

  const icon = document.createElement("link");
  icon.rel = "icon";
  icon.href = "data:image/svg+xml," + encodeURIComponent(find("#brand svg").outerHTML);
  document.head.append(icon);
  const chosen = localStorage.getItem("owl2-language");
  const language = chosen || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
  setLanguage(language);
  if (saved) find("#recover").click();
  return language;
}
