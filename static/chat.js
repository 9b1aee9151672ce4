// The page of the chat, without a library. It promises that what was typed is sent
// once and in order, and that what others said is shown once and in order.
"use strict";

const find = (id) => document.getElementById(id);
const user = find("user").textContent;
const log = find("log");
const messages = find("messages");
const box = find("text");
const maxLength = Number(box.dataset.maxLength);

let socket = null;
let failures = 0; // connections in a row that did not get as far as `welcome`
let lastId = Number(messages.lastElementChild?.dataset.id ?? 0);
let inFlight = null; // the nonce that waits for its receipt, one at a time
let retry = 0; // the timer that sends it again
let unread = 0;
let atEnd = true; // whether the newest message was in sight before a resize
let online = new Set();

// --- What was typed: kept in this tab until the server has it ---
const storageKey = "unsent " + user;
let { draft, pending } = JSON.parse(sessionStorage.getItem(storageKey)) ?? { draft: "", pending: [] };

function keep() {
  draft = box.value;
  sessionStorage.setItem(storageKey, JSON.stringify({ draft, pending }));
}

function submit() {
  const text = box.value;
  const length = [...text].length; // characters, as the server counts them
  if (!text.trim()) return;
  if (length > maxLength) {
    showProblem(`A message has at most ${maxLength} characters; this one has ${length}.`);
    return;
  }
  pending.push({ nonce: makeNonce(), text });
  showPending(pending.at(-1));
  box.value = "";
  showProblem("");
  keep();
  scrollToEnd();
  sendNext();
}

function makeNonce() { // crypto.randomUUID is missing where there is no https
  return Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(36)).join("-");
}

// One at a time, so that a message that has to be repeated is not overtaken.
function sendNext() {
  if (!online.size || inFlight || !pending.length) return; // nobody is online before `welcome`
  const { nonce, text } = pending[0];
  inFlight = nonce;
  socket.send(JSON.stringify({ type: "message", text, nonce }));
  clearTimeout(retry);
  retry = setTimeout(sendAgain, 10_000);
}

function sendAgain() {
  inFlight = null;
  sendNext();
}

function forget(nonce) {
  pending = pending.filter((message) => message.nonce !== nonce);
  messages.querySelector(`[data-nonce="${CSS.escape(nonce)}"]`)?.remove();
  if (inFlight === nonce) inFlight = null;
  keep();
}

// --- What the server tells ---
function handle(event) {
  switch (event.type) {
    case "message":
      return handleMessage(event);
    case "welcome":
      if (event.last < lastId) return location.reload(); // another history: start afresh
      failures = 0;
      online = new Set(event.online);
      showStatus("online");
      showOnline();
      return sendNext();
    case "joined":
      online.add(event.user);
      showOnline();
      return showNotice(`${event.user} joined`);
    case "left":
      online.delete(event.user);
      showOnline();
      return showNotice(`${event.user} left`);
    case "error":
      return handleError(event);
    default:
      throw new Error(`unknown event ${event.type}`);
  }
}

function handleMessage(event) {
  if (event.id > lastId + 1) return location.reload(); // more was missed than is replayed
  const own = event.user === user && pending.some((message) => message.nonce === event.nonce);
  if (own) forget(event.nonce);
  if (event.id > lastId) {
    lastId = event.id;
    showMessage(event);
  }
  if (own) {
    showProblem("");
    sendNext();
  }
}

function handleError(event) {
  showProblem(event.text);
  if (event.nonce === undefined || event.nonce !== inFlight) return;
  clearTimeout(retry);
  if (event.code === "not_saved" || event.code === "too_fast") {
    retry = setTimeout(sendAgain, 1000 + 1000 * Math.random());
  } else { // it will never be taken: back to the box with it
    const { text } = pending[0];
    forget(event.nonce);
    box.value = box.value ? `${text}\n${box.value}` : text;
    keep();
    sendNext();
  }
}

// --- The connection ---
function connect() {
  if (socket && socket.readyState <= WebSocket.OPEN) return;
  const address = new URL("/ws", location.href);
  address.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  address.searchParams.set("after", lastId);
  showStatus("connecting");
  socket = new WebSocket(address);
  socket.onmessage = (message) => handle(JSON.parse(message.data));
  socket.onclose = disconnected;
}

function disconnected() {
  online = new Set();
  inFlight = null;
  clearTimeout(retry);
  showStatus("offline");
  showOnline();
  failures += 1;
  const delay = Math.min(15_000, 250 * 2 ** failures) * (0.5 + Math.random());
  setTimeout(failures > 1 ? connectOrSignIn : connect, delay);
}

// A handshake that fails does not say why. A page does: it redirects to the login.
async function connectOrSignIn() {
  try {
    const page = await fetch("/", { redirect: "manual" });
    if (page.type === "opaqueredirect") return location.assign("/login");
  } catch {
    // The server is not there; connecting fails as well, and tries again.
  }
  connect();
}

// --- What is shown: text is always textContent, never markup ---
function make(name, text = "", properties = {}) {
  return Object.assign(document.createElement(name), { textContent: text }, properties);
}

function show(item) {
  const follow = isAtEnd();
  if (item.dataset.nonce) messages.append(item);
  else messages.insertBefore(item, messages.querySelector(".pending"));
  if (follow) scrollToEnd();
}

function isAtEnd() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < 40;
}

function scrollToEnd() {
  log.scrollTop = log.scrollHeight;
}

function showMessage({ id, user: author, text, time }) {
  const item = make("li");
  item.dataset.id = id;
  item.append(make("strong", author), " ", make("time", "", { dateTime: time }), make("p", text));
  finish(item);
  show(item);
  if (document.hidden) showUnread(unread + 1);
}

// Messages in the page as it came from the server get the same finish.
function finish(item) {
  const time = item.querySelector("time");
  const date = new Date(time.dateTime);
  const today = date.toDateString() === new Date().toDateString();
  time.textContent = today ? date.toLocaleTimeString([], { timeStyle: "short" })
    : date.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
  time.title = date.toLocaleString();
  item.classList.toggle("own", item.querySelector("strong").textContent === user);
}

function showPending({ nonce, text }) {
  const item = make("li", "", { className: "own pending" });
  item.dataset.nonce = nonce;
  item.append(make("strong", user), " ", make("span", "sending …", { className: "hint" }), make("p", text));
  show(item);
}

function showNotice(text) {
  show(make("li", text, { className: "notice" }));
}

function showOnline() {
  find("count").textContent = online.size || "";
  find("online").replaceChildren(...[...online].sort().map((name) => make("li", name)));
}

function showStatus(text) {
  find("status").textContent = text;
  find("status").dataset.status = text;
}

function showProblem(text) {
  find("problem").textContent = text;
}

function showUnread(count) {
  unread = count;
  document.title = count ? `(${count}) Chat` : "Chat";
}

async function showOlder(click) {
  click.preventDefault();
  const link = click.currentTarget;
  const answer = await fetch(link.href).catch(() => null);
  if (!answer?.ok || answer.redirected) return location.assign(link.href);
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  const items = [...page.querySelectorAll("#messages li")];
  items.forEach(finish);
  const height = log.scrollHeight;
  messages.prepend(...items);
  const next = page.getElementById("older");
  if (next) link.href = next.getAttribute("href");
  else link.parentElement.remove();
  log.scrollTop += log.scrollHeight - height;
}

// --- Wiring ---
find("send").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
box.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
box.addEventListener("input", () => {
  showProblem("");
  keep();
});
log.addEventListener("scroll", () => {
  atEnd = isAtEnd();
});
new ResizeObserver(() => { // as when a phone shows its keyboard
  if (atEnd) scrollToEnd();
}).observe(log);
find("older")?.addEventListener("click", showOlder);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden) showUnread(0);
});
window.addEventListener("online", connect);
window.addEventListener("pageshow", (event) => {
  if (event.persisted) location.reload(); // from the back-forward cache: signed out?
});

messages.querySelectorAll("li").forEach(finish);
box.value = draft;
pending.forEach(showPending);
scrollToEnd();
box.focus();
connect();
