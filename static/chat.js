// The page of the chat, without a library. It promises two things: what it shows is true,
// and what you type is sent once and in order. This file has what you do and what the
// server tells, in the order of a message's life. connection.js delivers, log.js shows.

import { Connection, Outbox, isOver, keep, limit, recall } from "./connection.js";
import * as log from "./log.js";

const { find, user } = log;
const box = find("text");
// The other tabs of this browser. Without a channel, they find out from the server.
const tabs = window.BroadcastChannel && new BroadcastChannel("chat");
const touch = matchMedia("(pointer: coarse)").matches; // the keyboard has no Shift+Enter

const outbox = new Outbox(user);
const explain = (sentence) => tell("reason", sentence);
const connection = new Connection({ lastId: () => lastId, handle, lost, explain, signIn });

let lastId = Number(find("messages").lastElementChild?.dataset.id ?? 0);
let inFlight = null; // the nonce that waits for its receipt, one at a time
let retry = 0; // the timer that sends it again
let disagreements = 0; // in a row, about which message is the newest
let stale = false; // whether only a reload can make the page whole
let leftAt = 0; // when the page began to leave

// --- You write: into the box, the outbox and the log, in grey ---
function submit(event) {
  event.preventDefault();
  const text = box.value;
  const { length } = [...text]; // characters, as the server counts them
  box.focus();
  const { maxLength } = box.dataset;
  const tooLong = `A message has at most ${maxLength} characters; this one has ${length}.`;
  if (length > maxLength) return tell("problem", tooLong);
  if (!text.trim()) return null;
  box.value = "";
  tell("problem", "");
  log.showPending(outbox.add(text));
  return sendNext();
}

// Send one at a time: a message that has to be repeated must not be overtaken.
function sendNext() {
  const [message] = outbox.pending;
  if (!connection.live || inFlight || !message) return;
  inFlight = message.nonce;
  connection.send({ type: "message", ...message });
}

function sendAgain() {
  inFlight = null;
  sendNext();
}

// --- The server tells ---
function handle(event) {
  switch (event.type) {
    case "welcome": return handleWelcome(event);
    case "receipt": return handleReceipt(event);
    case "message": return handleMessage(event);
    case "error": return handleError(event);
    case "joined": case "left": return log.show(event, connection.live);
    case "heartbeat": return compare(event.last);
    default: throw new Error(`unknown event ${event.type}`);
  }
}

function handleWelcome(event) {
  if (event.user !== user) return becomeOther(event.user);
  log.flush();
  log.showOnline(event.online);
  showStatus("online");
  explain("");
  compare(event.last);
  return sendNext();
}

// The message is stored, so the next one may go. Its item waits for the broadcast. If the
// broadcast came before, as after a lost receipt, the item goes at once.
function handleReceipt({ nonce, id }) {
  outbox.remove(nonce);
  if (id <= lastId) log.forget(nonce);
  if (nonce !== inFlight) return;
  explain("");
  sendAgain();
}

function handleMessage(event) {
  if (event.id <= lastId) { // repeated by a process that is behind, or changed
    if (!log.update(event)) reloadSoon();
    return;
  }
  if (event.id > lastId + 1) reloadSoon(); // more was missed than the server replays
  lastId = event.id;
  if (event.user === user && outbox.remove(event.nonce)) explain("");
  log.show(event, connection.live);
}

// An error without a nonce is about the message in flight: the page sent nothing else.
// `problem` is about the text in the box and stays until you type. `reason` is about
// delivery: it goes when delivery works again.
function handleError({ code, text, nonce = inFlight }) {
  tell(code === "not_saved" ? "reason" : "problem", text);
  if (!nonce || nonce !== inFlight) return;
  if (code === "not_saved") retry = setTimeout(sendAgain, 1000 + 1000 * Math.random());
  else refuse(nonce);
}

// Don't repeat what the server refuses: it would block the messages behind it. Give it
// back to the user.
function refuse(nonce) {
  const message = outbox.remove(nonce);
  log.forget(nonce);
  const caret = box.selectionEnd ? "preserve" : "end"; // "end": of the text that comes back
  if (message) box.setRangeText(message.text + (box.value && "\n"), 0, 0, caret);
  outbox.keep(box.value);
  sendAgain();
}

// Act on the third disagreement in a row: a process may be behind for a while.
function compare(last) {
  disagreements = last === lastId ? 0 : disagreements + 1;
  if (stale || disagreements > 2) reloadSoon();
}

// --- The connection is lost, and the page says so ---
function lost(code, wasLive) {
  const nonce = inFlight;
  inFlight = null;
  clearTimeout(retry);
  if (code === 1009 && nonce) { // a frame too big
    tell("problem", "The message is too long.");
    refuse(nonce);
  }
  log.showOnline([]);
  showStatus(wasLive ? "connecting" : "offline");
}

function showStatus(text) {
  tell("status", text);
  find("status").dataset.status = text;
}

function tell(id, text) { // a screen reader speaks every change, so avoid empty ones
  if (find(id).textContent !== text) find(id).textContent = text;
}

// --- Who you are: the tabs of a browser share one session ---
function signIn() {
  explain("Your session has ended. Reload the page to sign in at once.");
  leave("/login?why=ended");
}

// Don't send what one user typed under the name of another: it waits in its own outbox.
function becomeOther(name) {
  connection.lose();
  explain(`This browser is now signed in as ${name}. Reload the page to go on.`);
  leave("/");
}

// Only the chat's own sign-in page shows that you are signed out: a proxy answers, too.
async function signOut(event) {
  event.preventDefault();
  leftAt = Date.now(); // the server ends this tab's socket, too: that is no surprise
  const options = { method: "POST", signal: AbortSignal.timeout(limit("answer")) };
  const answer = await fetch(event.target.action, options).catch(() => null);
  if (!answer?.ok || new URL(answer.url).pathname !== "/login") {
    leftAt = 0;
    return explain("Signing out did not work. You are still signed in.");
  }
  tabs?.postMessage("");
  return go("/login");
}

// --- Leaving by itself: at most once a minute, whatever the server says ---
// A page that may not leave yet asks again at the next heartbeat or failed connection.
function leave(address) {
  // Without storage the page cannot remember, so it waits until it is a minute old.
  const last = keep("left", recall("left") ?? 0) ? recall("left") : performance.timeOrigin;
  if (isLeaving() || !isOver("reload", last) || wouldLose()) return;
  keep("left", Date.now());
  go(address);
}

// To reload needs a server: otherwise the browser's error page would replace the chat.
function reloadSoon() {
  stale = true;
  if (connection.live) leave();
}

// The storage goes with the tab; without storage, what is unsent goes with the page.
const wouldLose = () => !outbox.kept && (outbox.pending.length || box.value);

// Stay connected until the next page comes: you may stop the loading, or it may fail.
function go(address = location.href) {
  leftAt = Date.now();
  location.assign(address);
}

const isLeaving = () => !isOver("answer", leftAt);

// --- Wiring ---
find("send").addEventListener("submit", submit);
box.addEventListener("keydown", (event) => {
  // Safari ends a composition before its Enter arrives; keyCode 229 gives that one away.
  const composing = event.isComposing || event.keyCode === 229;
  const newLine = event.shiftKey || (touch && !event.ctrlKey);
  if (event.key === "Enter" && !newLine && !composing) submit(event);
});
box.addEventListener("input", () => {
  tell("problem", "");
  outbox.keep(box.value);
});
find("signout").addEventListener("submit", signOut);
tabs?.addEventListener("message", ({ data: name }) => { // whose session the browser has now
  if (!name) go("/login?why=ended");
  else if (name !== user) becomeOther(name);
  else connection.wake(); // you have signed in again
});
window.addEventListener("online", () => connection.wake());
document.addEventListener("visibilitychange", () => document.hidden || connection.wake());
window.addEventListener("pageshow", (event) => {
  if (event.persisted) go(); // from the back-forward cache: signed out?
});
window.addEventListener("beforeunload", (event) => {
  if (wouldLose() || (outbox.pending.length && !isLeaving())) event.preventDefault();
});

for (const item of document.querySelectorAll("#messages .own")) outbox.remove(item.dataset.nonce);
outbox.pending.forEach(log.showPending);
box.value = outbox.draft || box.value;
if (touch) find("keys").remove();
find("send").inert = false;
find("late").remove();
if (window.self === window.top) box.focus(); // in a frame: the notebook keeps its keyboard
tabs?.postMessage(user);
connection.connect();
