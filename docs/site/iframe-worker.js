// A page that was opened from a disk may not start a Worker, and the search runs in one. There an invisible frame takes
// its place: it loads the script, and messages go to and fro between two windows. MkDocs' theme asks for this file by
// its name, and otherwise loads one like it from a network.
if (location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.frame = document.createElement("iframe");
      this.frame.hidden = true;
      document.documentElement.appendChild(this.frame);
      const inside = this.frame.contentWindow;
      // What the script calls to answer; a window's own function would want to know the origin of the receiver.
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = inside.document.createElement("script");
      script.src = new URL(url, document.baseURI).href;
      this.ready = new Promise(resolve => { script.onload = resolve; });
      inside.document.head.appendChild(script);
    }

    postMessage(data) {
      this.ready.then(() => this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.frame.remove();
    }
  };
}
